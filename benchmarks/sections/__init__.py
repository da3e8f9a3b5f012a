"""The sections of results on the page: a module each, with its tables, its headlines and its pictures."""
