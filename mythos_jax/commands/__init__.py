"""One module per command of `mythos`. Importing them is cheap: what a command needs is imported when it runs."""
