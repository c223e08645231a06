"""Disks and buckets: every file of a run goes through here.

storage         one folder, wherever it is: atomic writes, listings, retries
object_store    what object stores do differently
failures        which failures pass, and what a person is told of the others
ranges          byte ranges of files that are not ours
ledger          artifacts, committed file by file, finished by a manifest
lock            one driver at a time
"""
