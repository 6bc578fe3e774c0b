"""The HTTP server: an API that people already use, metrics, and a page (extra `serve`)."""
