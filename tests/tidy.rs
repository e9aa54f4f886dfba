//! The house checks itself: the rules that no compiler knows, as tests. Each finding names the file, the line and what
//! to write instead, and each rule is shown to catch a bad sample beside its code in `tidy/`.
//!
//! It owns no rule that clippy or rustc can hold; those are in the workspace's lints.

#[path = "tidy/arrows.rs"]
mod arrows;
#[path = "tidy/calls.rs"]
mod calls;
#[path = "tidy/kernels.rs"]
mod kernels;
#[path = "tidy/modules.rs"]
mod modules;
#[path = "tidy/places.rs"]
mod places;
#[path = "tidy/repo.rs"]
mod repo;
#[path = "tidy/size.rs"]
mod size;
#[path = "tidy/source.rs"]
mod source;

/// Files over the limit. The list may only shrink.
const LONG_FILES: &[size::Exception] = &[];

/// Functions over the limit. The list may only shrink.
const LONG_FUNCTIONS: &[size::Exception] = &[];

#[track_caller]
fn assert_tidy(findings: &[String]) {
    assert!(findings.is_empty(), "\n\n{}\n", findings.join("\n"));
}

#[test]
fn files_are_short() {
    assert_tidy(&size::file_lengths(&repo::read(), LONG_FILES));
}

#[test]
fn functions_are_short() {
    assert_tidy(&size::function_lengths(&repo::read(), LONG_FUNCTIONS));
}

#[test]
fn crates_keep_their_arrows() {
    assert_tidy(&arrows::wrong(&repo::read()));
}

#[test]
fn constructs_stand_in_their_places() {
    assert_tidy(&places::misplaced(&repo::read()));
}

#[test]
fn nothing_is_promised() {
    assert_tidy(&places::promises(&repo::read()));
}

#[test]
fn no_path_of_one_machine_is_written() {
    assert_tidy(&places::machine_paths(&repo::read()));
}

#[test]
fn no_path_is_baked_into_a_binary() {
    assert_tidy(&places::baked_paths(&repo::read()));
}

#[test]
fn every_module_says_its_purpose() {
    assert_tidy(&modules::without_purpose(&repo::read()));
}

#[test]
fn file_names_say_something() {
    assert_tidy(&modules::empty_names(&repo::read()));
}

#[test]
fn every_kernel_is_listed() {
    assert_tidy(&kernels::unlisted(&repo::read()));
}

#[test]
fn every_call_through_cudarc_is_listed() {
    assert_tidy(&calls::unlisted(&repo::read()));
}

#[test]
fn the_backend_is_narrow() {
    assert_tidy(&kernels::backend_is_narrow(&repo::read()));
}
