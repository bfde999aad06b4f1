"""The command line `llava-triton`, and what it shows: a chat in the terminal and on a page."""
