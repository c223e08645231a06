"""The picture formats of data sets: which of them are read, and under which extensions their files are known.

Every list of picture formats or extensions in the pairs stage derives from this one.
"""

# Formats by Pillow's name, with the extensions of their files, most frequent first. Pillow knows many more, some of
# which start other programs (EPS), have seen little testing, or decode before their size can be checked (ICO).
EXTENSIONS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    # Nobody names a picture so, but servers send it.
    "DIB": (),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2",),
    "PPM": ("ppm",),
    "TGA": (),
}
# What a picture's bytes may be, whatever they are called.
DECODED = tuple(EXTENSIONS)
# What the pairs stage writes, in the order in which a reader looks for them.
STORED = ("jpg", "webp", "png")
# What is taken for a picture by its name: in a folder, and in a tar.
IN_FOLDERS = tuple(extension for each in EXTENSIONS.values() for extension in each)
IN_TARS = tuple(extension for extension in IN_FOLDERS if extension not in ("jp2", "ppm"))
