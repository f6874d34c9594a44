//! The laptop: autokexec, discovery answers, the boot bundle over HTTP, the disk over NBD.
