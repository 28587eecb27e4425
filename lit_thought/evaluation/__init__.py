"""Plain, instructed and patched, side by side, and the report of it. (The files of results are ``patch.results``.)"""
