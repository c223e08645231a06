"""Sources of pairs: tables, folders, tars, on local disks or remote stores."""
