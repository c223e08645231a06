"""Disks and buckets: every file of a run goes through here.

storage         one folder of ours, wherever it is: whole files or none, listings, conditional writes
location        files and folders of others: byte ranges, facts, listings
local_disk      atomic writes on a local disk
object_store    requests to object stores, and their retries
filesystems     file systems by URL: the only user of fsspec
failures        which failures are transient, and what a person is told of the others
remembered      what a process remembers of a file until the file changes
threads         many slow answers at once
listing         names and sizes in large folders, many pages at once
ledger          artifacts: named, found, replaced
manifest        what a finished artifact says of itself
file_table      its files, as columns
commits         files committed one by one while an artifact is made
lock            one driver an artifact
"""
