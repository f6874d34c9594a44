//! A grub.cfg in the shape that Debian's update-grub leaves: the default entry, and a submenu with all kernels.
//!
//! GRUB itself is not installed: the file is what the laptop's service reads to find its payload.

/// The configuration for one kernel on the file system `uuid`; `args` is the kernel's command line behind `root=`.
pub(super) fn config(version: &str, uuid: &str, args: &str) -> String {
    let plain = entry(
        "",
        "Debian GNU/Linux",
        &format!("gnulinux-simple-{uuid}"),
        version,
        uuid,
        args,
    );
    let title = format!("Debian GNU/Linux, with Linux {version}");
    let id = format!("gnulinux-{version}-advanced-{uuid}");
    let normal = entry("\t", &title, &id, version, uuid, args);
    let title = format!("{title} (recovery mode)");
    let id = format!("gnulinux-{version}-recovery-{uuid}");
    let recovery = entry("\t", &title, &id, version, uuid, &format!("single {args}"));
    format!(
        "if [ -s $prefix/grubenv ]; then\n\
         \x20 set have_grubenv=true\n\
         \x20 load_env\n\
         fi\n\
         if [ \"${{next_entry}}\" ] ; then\n\
         \x20  set default=\"${{next_entry}}\"\n\
         \x20  set next_entry=\n\
         \x20  save_env next_entry\n\
         \x20  set boot_once=true\n\
         else\n\
         \x20  set default=\"0\"\n\
         fi\n\
         set timeout=5\n\
         {plain}\
         submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-{uuid}' {{\n\
         {normal}{recovery}}}\n"
    )
}

fn entry(indent: &str, title: &str, id: &str, version: &str, uuid: &str, args: &str) -> String {
    let lines = [
        format!(
            "menuentry '{title}' --class debian --class gnu-linux --class gnu --class os \
             $menuentry_id_option '{id}' {{"
        ),
        "\tload_video".to_owned(),
        "\tinsmod gzio".to_owned(),
        "\tinsmod part_gpt".to_owned(),
        "\tinsmod ext2".to_owned(),
        format!("\tsearch --no-floppy --fs-uuid --set=root {uuid}"),
        format!("\techo\t'Loading Linux {version} ...'"),
        format!("\tlinux\t/boot/vmlinuz-{version} root=UUID={uuid} ro {args}"),
        "\techo\t'Loading initial ramdisk ...'".to_owned(),
        format!("\tinitrd\t/boot/initrd.img-{version}"),
        "}".to_owned(),
    ];
    lines.iter().map(|line| format!("{indent}{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_entry_is_the_default_and_boots_the_kernel() {
        let text = config("6.1.0-1-amd64", "u-u", "quiet");
        assert!(text.contains("set default=\"0\""));
        let first = text.split("menuentry '").nth(1).unwrap();
        assert!(
            first.contains("\n\tlinux\t/boot/vmlinuz-6.1.0-1-amd64 root=UUID=u-u ro quiet\n"),
            "{first}"
        );
        assert!(
            first.contains("\n\tinitrd\t/boot/initrd.img-6.1.0-1-amd64\n"),
            "{first}"
        );
    }

    #[test]
    fn every_brace_is_closed() {
        let text = config("1", "u", "");
        let count = |c| text.lines().filter(|line| line.trim().ends_with(c)).count();
        assert_eq!(text.matches("menuentry '").count(), 3);
        assert_eq!(count(" {"), 4);
        assert_eq!(text.lines().filter(|line| line.trim() == "}").count(), 4);
    }
}
