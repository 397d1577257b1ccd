"""The command line `adakv`, in front of the programs of the other packages."""
