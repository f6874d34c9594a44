//! The desktop: discovery, fetch, kexec; attaches and keeps the disk inside the payload.
