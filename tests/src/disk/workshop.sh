#!/bin/sh
# The first process of the workshop, a machine that lays out and checks laptops' disks (see workshop.rs). It has the installed
# system as its own root file system, and the disk with the serial number "target", partitioned. What to do is on the
# kernel's command line: workshop.job=make|check, workshop.layout=, workshop.uuid= (of the root file system to be made),
# workshop.luks_uuid= (as in the installed system's crypttab), workshop.passphrase=. Says "workshop: done" at the end.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/root

finish() {
    status=$?
    if [ "$status" = 0 ]; then echo 'workshop: done'; else echo "workshop: failed with status $status"; fi
    sync
    echo o >/proc/sysrq-trigger
    sleep 600
}
trap finish EXIT

word() {
    tr ' ' '\n' </proc/cmdline | sed -n "s/^workshop\.$1=//p"
}

# dm-crypt's and LVM's volumes of the disk.
open_volumes() {
    printf %s "$passphrase" | cryptsetup open --key-file - "$second" $crypt
    vgchange -q --activate y
    udevadm settle
}

root_device() {
    case $layout in
        luks-lvm) echo /dev/mapper/laptop--vg-root ;;
        xfs) echo "$second" ;;
        *) echo "$first" ;;
    esac
}

make_file_systems() {
    case $layout in
        luks-lvm)
            printf %s "$passphrase" | cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 \
                --pbkdf-force-iterations 1000 --uuid "$luks_uuid" "$second" -
            printf %s "$passphrase" | cryptsetup open --key-file - "$second" $crypt
            pvcreate -q /dev/mapper/$crypt
            vgcreate -q laptop-vg /dev/mapper/$crypt
            lvcreate -q --yes -L 64M -n swap_1 laptop-vg
            lvcreate -q --yes -l 100%FREE -n root laptop-vg
            udevadm settle
            mkswap -q /dev/mapper/laptop--vg-swap_1
            mkfs.ext4 -q -U "$root_uuid" "$(root_device)"
            ;;
        btrfs)
            mkfs.btrfs -q -U "$root_uuid" "$first"
            mount "$first" /target
            btrfs -q subvolume create /target/@
            btrfs -q subvolume create /target/@home
            umount /target
            ;;
        xfs) mkfs.xfs -q -m uuid="$root_uuid" "$second" ;;
    esac
    if [ "$layout" != btrfs ]; then
        mkfs.ext4 -q -U "$boot_uuid" "$first"
    fi
    udevadm trigger --settle
}

mount_target() {
    if [ "$layout" = btrfs ]; then
        mount -o subvol=@ "$first" /target
        mkdir /target/home
        mount -o subvol=@home "$first" /target/home
    else
        mount "$(root_device)" /target
        mkdir /target/boot
        mount "$first" /target/boot
    fi
}

# An emulated machine with many neighbours may take longer than systemd waits for a device.
write_tables() {
    case $layout in
        luks-lvm)
            echo "/dev/mapper/laptop--vg-root / ext4 errors=remount-ro 0 1"
            echo "UUID=$boot_uuid /boot ext4 defaults,x-systemd.device-timeout=10min 0 2"
            echo "/dev/mapper/laptop--vg-swap_1 none swap sw,x-systemd.device-timeout=10min 0 0"
            ;;
        btrfs)
            echo "UUID=$root_uuid / btrfs defaults,subvol=@ 0 0"
            echo "UUID=$root_uuid /home btrfs defaults,subvol=@home 0 0"
            ;;
        xfs)
            echo "UUID=$root_uuid / xfs defaults 0 0"
            echo "UUID=$boot_uuid /boot ext4 defaults,x-systemd.device-timeout=10min 0 2"
            ;;
    esac >/target/etc/fstab
}

make() {
    make_file_systems
    mount_target
    # Without what is mounted here. What lies below /boot is written to its own file system.
    cp -ax /. /target
    rm -r /target/workshop /target/target
    write_tables
    for folder in dev proc sys run; do
        mount --rbind "/$folder" "/target/$folder"
    done
    # As the boot loader's packages would leave it, which are not installed.
    printf '%s\n' GRUB_DEFAULT=0 GRUB_TIMEOUT=5 GRUB_DISTRIBUTOR=Debian "GRUB_CMDLINE_LINUX=\"$arguments\"" \
        >/target/etc/default/grub
    chroot /target update-grub
    grep -E 'linux|initrd' /target/boot/grub/grub.cfg
    for folder in dev proc sys run; do
        umount -l "/target/$folder"
    done
    umount -R /target
    if [ "$layout" = luks-lvm ]; then
        vgchange -q --activate n
        cryptsetup close $crypt
    fi
}

check_ext4() {
    said=$(e2fsck -fn "$1" 2>&1) || { echo "$said"; return 1; }
    echo "$said"
    case $said in *'skipping journal recovery'*) return 1 ;; esac
}

check() {
    case $layout in
        luks-lvm)
            open_volumes
            check_ext4 "$(root_device)"
            ;;
        btrfs)
            btrfs check --readonly "$first"
            # What was synced but is not in the trees yet.
            btrfs inspect-internal dump-super "$first" | grep -E '^log_root[[:space:]]+0$'
            ;;
        xfs)
            xfs_logprint -t "$second" | grep '<CLEAN>'
            xfs_repair -n "$second"
            ;;
    esac
    if [ "$layout" != btrfs ]; then
        check_ext4 "$first"
    fi
}

boot_uuid=57aefe1d-0000-4000-8000-000000000004
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
crypt=vda2_crypt
layout=$(word layout) job=$(word job) root_uuid=$(word uuid) luks_uuid=$(word luks_uuid) passphrase=$(word passphrase)
arguments='console=tty0 console=ttyS0,115200 no_timer_check modprobe.blacklist=cdc_subset'
# Other file systems in memory would be copied.
mountpoint -q /run || mount -t tmpfs tmpfs /run
mount -o remount,rw /
mkdir -p /target
/lib/systemd/systemd-udevd --daemon
udevadm trigger --settle
first=$(readlink -f /dev/disk/by-id/virtio-target-part1)
second=${first%1}2
case $job in
    make) make ;;
    check) check ;;
    *) echo "the job $job is not known"; exit 2 ;;
esac
