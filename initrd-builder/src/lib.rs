//! Builds the ramdisk, the modules overlay and the stick image.
