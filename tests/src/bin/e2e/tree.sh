#!/bin/sh
# Prints all of the system's files with their kinds, modes, owners and links; with their checksums where machines and people write,
# with their sizes and times below /usr; but for what a running system changes by itself. Two of these are compared.
set -eu
export LC_ALL=C
left_out='/proc /sys /dev /run /tmp /var/tmp /var/log /var/cache /var/lib/dpkg /var/lib/systemd /var/lib/NetworkManager
/etc/resolv.conf /root/tree /lost+found'
prune=''
for folder in $left_out; do
    prune="$prune -o -path $folder"
done
places=/
for place in /boot /home; do
    if mountpoint -q "$place"; then
        places="$places $place"
    fi
done
# shellcheck disable=SC2086 # one word each
{
    find $places -xdev \( -false $prune \) -prune -o -type f -path '/usr/*' -printf '%p f %m %U:%G %s %T@\n' \
        -o -printf '%p %y %m %U:%G %l\n'
    find $places -xdev \( -false $prune -o -path /usr \) -prune -o -type f -print0 | xargs -0 sha256sum
} | sort
