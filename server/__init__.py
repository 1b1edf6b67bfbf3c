"""Serve a bundle: the averaged ensemble over HTTP."""
