"""Downloads over HTTP from servers that are slow, broken or hostile."""
