"""Parts of the HTML pages: of a run, of a search and of the server."""
