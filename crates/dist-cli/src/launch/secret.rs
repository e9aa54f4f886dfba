//! The secret that ranks prove to each other.
//!
//! Ranks that this program starts get a random one through a pipe. Ranks that somebody else starts on one machine share
//! one that lies in a folder of the user's own (`$XDG_RUNTIME_DIR/dist-cli`, else `/tmp/dist-cli-UID`), which the first
//! of them makes: whoever can read it could read the processes' memory as well. It is not removed, so that no run can
//! meet another's leftovers. Several machines need `--secret-file` or `DIST_SECRET`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use dist_comm::auth::{Secret, random_bytes};

use crate::problem::Problem;

/// What is said to whoever has none.
pub const HOW_TO: &str = "make one with `head -c 32 /dev/urandom | base64 > secret; chmod 600 secret`, copy it to all \
                          machines and give --secret-file secret to each, or set DIST_SECRET to it";

/// The secret that the user gave, if any.
pub fn given(file: Option<&Path>) -> anyhow::Result<Option<Secret>> {
    let (what, bytes) = if let Some(path) = file {
        let what = format!("--secret-file {}", path.display());
        let bytes = fs::read(path);
        (what.clone(), bytes.map_err(|error| Problem::usage(format!("cannot read {what}")).because(error))?)
    } else if let Some(secret) = std::env::var_os("DIST_SECRET") {
        ("DIST_SECRET".to_owned(), secret.into_encoded_bytes())
    } else {
        return Ok(None);
    };
    let secret = Secret::new(bytes.trim_ascii());
    Ok(Some(secret.map_err(|error| Problem::usage(format!("{what} cannot be used")).because(error))?))
}

/// A new one, for ranks that this process starts.
pub fn random() -> anyhow::Result<Secret> {
    Ok(Secret::random()?)
}

/// The one of this user on this machine; the first who asks makes it.
pub fn of_user() -> anyhow::Result<Secret> {
    let uid = rustix::process::getuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    let dir = match runtime {
        Some(runtime) => runtime.join("dist-cli"),
        None => std::env::temp_dir().join(format!("dist-cli-{uid}")),
    };
    shared(&dir, uid).map_err(|error| {
        let what = format!("cannot keep a secret in {}", dir.display());
        Problem::failed(what)
            .because(error)
            .help(format!("remove that folder if it is not yours, or {HOW_TO}"))
            .into()
    })
}

/// Reads `dir`'s secret, or makes folder and secret. Only this user's own, closed to all others, will do.
fn shared(dir: &Path, uid: u32) -> io::Result<Secret> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    require_private(dir, &fs::symlink_metadata(dir)?, uid)?;
    let path = dir.join("secret");
    if !path.exists() {
        make(dir, &path)?;
    }
    require_private(&path, &fs::symlink_metadata(&path)?, uid)?;
    Secret::new(&fs::read(&path)?).map_err(io::Error::other)
}

/// Written whole beside and then linked, so that nobody reads half of it and only the first one counts.
fn make(dir: &Path, path: &Path) -> io::Result<()> {
    let secret = Secret::random().map_err(io::Error::other)?;
    let own = random_bytes::<8>().map_err(io::Error::other)?;
    let beside = dir.join(format!("secret.{:016x}", u64::from_le_bytes(own)));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(secret.expose())?;
    let linked = fs::hard_link(&beside, path);
    fs::remove_file(&beside)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn require_private(path: &Path, metadata: &fs::Metadata, uid: u32) -> io::Result<()> {
    let is_link = metadata.file_type().is_symlink();
    let of_others = metadata.mode() & 0o077;
    if metadata.uid() == uid && of_others == 0 && !is_link {
        return Ok(());
    }
    Err(io::Error::other(format!("{} is open to other users", path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn all_who_ask_at_the_same_time_get_the_same_secret() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, uid) = (dir.path().join("own"), rustix::process::getuid().as_raw());
        let found: Vec<_> = std::thread::scope(|scope| {
            let ask = || shared(&dir, uid).unwrap().expose().to_vec();
            let askers: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            askers.into_iter().map(|asker| asker.join().unwrap()).collect()
        });
        assert!(found.iter().all(|secret| *secret == found[0] && secret.len() == 32));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn what_others_can_open_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, uid) = (dir.path().join("own"), rustix::process::getuid().as_raw());
        shared(&dir, uid).unwrap();
        assert!(shared(&dir, uid + 1).is_err(), "somebody else's");
        fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(shared(&dir, uid).unwrap_err().to_string().contains("open to other users"));
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(shared(&dir, uid).is_err());
    }
}
