"""Reading a checkpoint, for the export and the server."""
