# Read by install.rs: a small tree of a laptop, a ramdisk that is whole, and a list of the tree.
mkdir -p "$2/root/etc/kernel/postinst.d" "$2/root/var/lib/dpkg" "$2/ramdisk"
: >"$2/root/var/lib/dpkg/status"
part() {
    printf '{"bytes": %s, "sha256": "%s"}' "$(wc -c <"$1")" "$(sha256sum <"$1" | cut -d' ' -f1)"
}
head -c 3000000 /dev/zero >"$2/ramdisk/kernel"
head -c 3000000 /dev/zero >"$2/ramdisk/ramdisk.cpio.zst"
cat >"$2/ramdisk/manifest" <<EOF
{"stiefel_version": "0", "kernel_version": "6.1", "kernel": $(part "$2/ramdisk/kernel"),
 "ramdisk": $(part "$2/ramdisk/ramdisk.cpio.zst"), "unpacked_bytes": 1, "modules": 1, "wireguard": true,
 "firmware": 0, "missing_firmware": 0, "classes": []}
EOF
tree=$2/root
list() {
    (cd "$tree" && find . ! -type d -printf '%p %M %U:%G %s %T@ %l\n' -o -printf '%p %M %U:%G\n' | sort)
}
