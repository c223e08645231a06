"""Looking at what there is: `inspect` says what is in it, `verify` whether it is whole and true."""
