#!/bin/bash
# dracut module: puts stiefel's attach step (program, modules, firmware, below /stiefel) into this system's own initrd.
# Install: cp -r this folder to /usr/lib/dracut/modules.d/, then dracut --force. See docs/distributions/fedora.md.
# A failure is told, and leaves the initrd as it is without stiefel: it starts this machine all the same.
check() {
    return 0
}

depends() {
    return 0
}

install() {
    # shellcheck disable=SC2154 # dracut sets initdir and kernel
    PATH=$PATH:/usr/local/bin stiefel bake "$initdir" "$kernel" ||
        echo "stiefel: its attach step is not in the initrd of $kernel" >&2
    return 0
}
