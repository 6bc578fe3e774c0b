"""Programs compiled ahead of time for TPUs that are not attached: do they fit, and what limits a step?"""
