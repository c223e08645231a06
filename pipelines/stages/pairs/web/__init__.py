"""Fetching pictures over HTTP from servers that are slow, broken or hostile."""
