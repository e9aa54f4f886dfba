//! Libraries that are not there, are none, or lack what is called.

use super::*;

fn only(dir: &Path) -> Libraries {
    Libraries::new(LibraryDirs { first: vec![dir.to_owned()], asks_loader: false, last: Vec::new() })
}

#[test]
fn an_empty_folder_has_no_library_and_the_error_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let libraries = only(dir.path());
    let errors = [
        libraries.driver().unwrap_err(),
        libraries.nvrtc().unwrap_err(),
        libraries.cublas_lt().unwrap_err(),
        libraries.nccl().unwrap_err(),
    ];
    for (error, file) in
        errors.iter().zip(["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13", "libnccl.so.2"])
    {
        assert!(matches!(error, LibraryError::NotFound { .. }), "{error:?}");
        let told = error.to_string();
        assert!(told.contains(file) && told.contains(&dir.path().display().to_string()), "{told}");
        assert!(error.help().contains("DIST_CUDA_LIB"), "{}", error.help());
    }
}

#[test]
fn a_file_that_is_no_library_is_named_with_what_the_loader_says() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["libcuda.so.1", "libnvrtc.so.13"] {
        std::fs::write(dir.path().join(file), "not a library").unwrap();
    }
    let libraries = only(dir.path());
    for error in [libraries.driver().unwrap_err(), libraries.nvrtc().unwrap_err()] {
        let LibraryError::Unusable { path, why, .. } = &error else { panic!("{error:?}") };
        assert_eq!(path.parent(), Some(dir.path()));
        assert!(why.contains("ELF") || why.contains("too short"), "{why}");
    }
}

#[test]
fn a_library_without_its_functions_is_unusable() {
    // The C library is a library everywhere, and has no function of CUDA's.
    let Some(libc) = mapped("libc.so.6") else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(libc, dir.path().join("libcublasLt.so.13")).unwrap();
    let error = only(dir.path()).cublas_lt().unwrap_err();
    assert!(
        matches!(&error, LibraryError::Unusable { why, .. } if why.contains("cublasLtGetVersion")),
        "{error}"
    );
}

#[test]
fn numbers_are_versions() {
    assert_eq!(Version::of_number(13_000, 1000, 10).to_string(), "13.0");
    assert_eq!(Version::of_number(12_080, 1000, 10), Version { major: 12, minor: 8 });
    assert_eq!(Version::of_number(130_100, 10_000, 100).to_string(), "13.1");
    assert!(Version { major: 12, minor: 8 } < Version { major: 13, minor: 0 });
}
