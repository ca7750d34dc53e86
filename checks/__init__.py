"""Is this text what a run needs? forms.py: files of another form; pairs.py: wrong pairs."""
