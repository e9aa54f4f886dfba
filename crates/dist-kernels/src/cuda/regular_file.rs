//! Reading a file of a folder that others may write to: only a regular one, and only so many bytes. What a name leads to
//! is looked at before it is opened, because opening a pipe waits for somebody to write.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

/// All bytes of the file; `None` if there is none, and why it is not read if it is none of ours.
pub(super) fn read(path: &Path, n_bytes_max: u64) -> Result<Option<Vec<u8>>, String> {
    let told = |error: io::Error| error.to_string();
    match fs::metadata(path) {
        Ok(metadata) => n_bytes(&metadata, n_bytes_max)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(told(error)),
    };
    let file = fs::File::open(path).map_err(told)?;
    // Another file may stand there by now.
    let n_bytes = n_bytes(&file.metadata().map_err(told)?, n_bytes_max)?;
    let mut bytes = Vec::with_capacity(n_bytes as usize);
    // No more than it has: one that the system makes up may never end.
    file.take(n_bytes).read_to_end(&mut bytes).map_err(told)?;
    Ok(Some(bytes))
}

fn n_bytes(metadata: &fs::Metadata, most: u64) -> Result<u64, String> {
    match metadata.len() {
        _ if !metadata.is_file() => Err("it is no regular file".to_owned()),
        len if len > most => Err(format!("it has {len} bytes, more than {most}")),
        len => Ok(len),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Puts at `path` one after the other what must neither be waited for nor taken whole, and checks each.
    pub(crate) fn with_each_fault(path: &Path, mut check: impl FnMut(&str)) {
        let make_pipe = || std::process::Command::new("mkfifo").arg(path).status().unwrap().success();
        assert!(make_pipe());
        check("a pipe");
        let _ = fs::remove_file(path);
        for (what, target) in [("a device", "/dev/zero"), ("a file that tells no size", "/proc/self/maps")] {
            std::os::unix::fs::symlink(target, path).unwrap();
            check(what);
            let _ = fs::remove_file(path);
        }
        // It has a size and takes no room.
        fs::File::create(path).unwrap().set_len(1 << 40).unwrap();
        check("a file of a terabyte");
        let _ = fs::remove_file(path);
        fs::create_dir(path).unwrap();
        check("a folder");
        fs::remove_dir(path).unwrap();
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert_eq!(read(&path, 3), Ok(None));
        fs::write(&path, "abc").unwrap();
        assert_eq!(read(&path, 3), Ok(Some(b"abc".to_vec())));
        assert!(read(&path, 2).unwrap_err().contains("3 bytes, more than 2"));
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert_eq!(read(&dir.path().join("link"), 3), Ok(Some(b"abc".to_vec())));
        fs::remove_file(&path).unwrap();
        with_each_fault(&path, |what| {
            let found = read(&path, 1 << 20);
            // What says that it is empty is read as such.
            assert!(
                matches!(&found, Err(_) | Ok(Some(_))) && found.iter().flatten().all(Vec::is_empty),
                "{what}"
            );
        });
    }
}
