"""The journal: what sessions said and showed, written down so that they survive their server."""
