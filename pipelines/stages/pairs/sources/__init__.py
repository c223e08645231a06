"""Where pairs come from: tables, folders, tars, on local disks or remote stores."""
