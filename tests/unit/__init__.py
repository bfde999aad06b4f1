"""Parts by themselves: no engine, no server."""
