"""The demo's world.

scenes      pictures of one coloured shape, and which of them are held out
captions    what people write under them
encodings   their files, in the formats that real web sites serve
dataset     the table that lists them, and the prompts
web         a server that misbehaves as the real web does
command     `ldm demo`
"""
