//! `stiefel key`: the sticks' keys, one file each.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use stiefel_server::collect;
use stiefel_shared::key::{self, StickKey};

use crate::cli::{KeyArgs, KeyCommand};

/// Runs it.
pub(crate) fn key(command: &KeyCommand) -> anyhow::Result<()> {
    match command {
        KeyCommand::New(args) => new(args),
        KeyCommand::List { dir, json } => list(dir, *json),
        KeyCommand::Revoke(args) => revoke(args),
    }
}

fn path(args: &KeyArgs) -> PathBuf {
    args.dir.join(format!("{}.key", args.name))
}

fn new(args: &KeyArgs) -> anyhow::Result<()> {
    let key = StickKey::generate(&args.name)?;
    let path = path(args);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.dir)
        .with_context(|| format!("cannot make the folder {}", args.dir.display()))?;
    let write = || -> std::io::Result<()> {
        // Beside, then a link: a key that exists is never replaced, and never half there.
        let beside = args.dir.join(format!(".{}.new", args.name));
        let mut file = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        std::io::Write::write_all(&mut file, key.to_file().as_bytes())?;
        file.sync_all()?;
        let linked = fs::hard_link(&beside, &path);
        fs::remove_file(&beside)?;
        linked?;
        fs::File::open(&args.dir)?.sync_all()
    };
    match write() {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!(
                "the key {} exists; choose another name, or revoke it first",
                path.display()
            )
        }
        other => other.with_context(|| format!("cannot write {}", path.display()))?,
    }
    eprintln!(
        "new key: {}; write its stick with `stiefel stick DEVICE --key {}`",
        path.display(),
        args.name
    );
    Ok(())
}

fn list(dir: &Path, json: bool) -> anyhow::Result<()> {
    let keys = collect::read_keys(dir)?;
    if json {
        let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
        println!("{}", serde_json::to_string(&names)?);
    } else {
        keys.iter().for_each(|key| println!("{}", key.name.as_str()));
    }
    Ok(())
}

fn revoke(args: &KeyArgs) -> anyhow::Result<()> {
    // The name must be one: it becomes part of a path.
    key::check_name(&args.name)?;
    let path = path(args);
    fs::remove_file(&path).with_context(|| {
        format!(
            "cannot delete {}; `stiefel key list` shows what there is",
            path.display()
        )
    })?;
    eprintln!(
        "{} is deleted; sticks written with it can wake the laptop no more, and are refused from the next serve on",
        path.display()
    );
    Ok(())
}
