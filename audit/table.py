ROWS = [
    (
        "MSE",
        "test_losses_against_loops",
        ("msd.py", "(x - y).square().mean()", "(x - y).square().sum()"),
        ("msd.py", "(x - y).square().mean()", "(x - y).abs().mean()"),
        (
            "msd.py",
            "return mse(cos_matrix(S_s, S_t), cos",
            "return mse(cos_matrix(S_s, S_t).detach(), cos",
        ),
    ),
]
