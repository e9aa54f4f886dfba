//! Stop strings: what is emitted does not depend on how the text was cut into tokens.

use dist_models::stop::{EmptyStop, StopMatcher};
use proptest::prelude::*;

/// Feeds `pieces`, separated by `|`, and shows what comes out of each; `!` ends a stopped sample, `+` begins the rest.
#[track_caller]
fn check_stop(stop: &[&str], min_new_tokens: usize, pieces: &str, expected: &str) {
    let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
    let mut matcher = StopMatcher::new(&stop, min_new_tokens).expect("no stop string is empty");
    let mut seen = Vec::new();
    for piece in pieces.split('|') {
        let piece = matcher.push(piece);
        seen.push(if piece.is_stopped { piece.text + "!" } else { piece.text });
    }
    assert_eq!(seen.join("|") + "+" + &matcher.flush(), expected, "{stop:?} in {pieces:?}");
}

#[test]
fn text_without_stop_strings_passes_at_once() {
    check_stop(&[], 0, "a|bc|", "a|bc|+");
    check_stop(&["xyz"], 0, "a|bc", "a|bc+");
}

#[test]
fn a_possible_beginning_is_held_back() {
    check_stop(&["</s>"], 0, "a<|/|s|>|b", "a|||!|!+");
    check_stop(&["</s>"], 0, "a<|/b", "a|</b+");
    check_stop(&["</s>"], 0, "a</s", "a+</s");
    check_stop(&["aab"], 0, "aaaa|b", "aa|!+");
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    check_stop(&["\n\n"], 0, "one\n\ntwo\n\n", "one!+");
    check_stop(&["\n\n"], 0, "one\n|two\n|\nthree", "one|\ntwo|!+");
}

#[test]
fn the_first_complete_one_wins_and_the_longest_of_equals() {
    check_stop(&["abcd", "bc"], 0, "xabcd", "xa!+");
    check_stop(&["bc", "abc"], 0, "xabc", "x!+");
    check_stop(&["c", "abcd"], 0, "ab|cd", "|ab!+");
}

#[test]
fn any_script_is_text() {
    check_stop(&["вс", "終"], 0, "да в|с終わり", "да |!+");
    check_stop(&["終"], 0, "终終わり", "终!+");
    check_stop(&["🦀🦀"], 0, "a🦀|b🦀|🦀", "a|🦀b|!+");
}

#[test]
fn the_text_of_the_first_tokens_is_not_looked_at() {
    check_stop(&["ab"], 2, "ab|a|b|ab", "ab|a|b|!+");
    check_stop(&["ab"], 1, "a|b|ab", "a|b|!+");
}

#[test]
fn an_empty_stop_string_is_refused() {
    assert_eq!(StopMatcher::new(&["a".into(), String::new()], 0).unwrap_err(), EmptyStop);
}

/// The text up to the first complete stop string, seen as a whole, one more character at a time.
fn whole(text: &str, stop: &[String]) -> (String, bool) {
    for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let longest = stop.iter().filter(|stop| text[..end].ends_with(*stop)).map(String::len).max();
        if let Some(len) = longest {
            return (text[..end - len].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

proptest! {
    #[test]
    fn the_cut_into_pieces_makes_no_difference(
        pieces in prop::collection::vec("[abé🦀]{0,4}", 0..12),
        stop in prop::collection::vec("[abé🦀]{1,4}", 0..4),
        min_new_tokens in 0..4usize,
    ) {
        let mut matcher = StopMatcher::new(&stop, min_new_tokens).unwrap();
        let (mut text, mut is_stopped) = (String::new(), false);
        for piece in &pieces {
            let piece = matcher.push(piece);
            prop_assert!(!is_stopped || (piece.is_stopped && piece.text.is_empty()), "nothing follows a stop");
            text += &piece.text;
            is_stopped = piece.is_stopped;
        }
        text += &matcher.flush();
        let (free, looked_at) = pieces.split_at(min_new_tokens.min(pieces.len()));
        let (expected, expected_stop) = whole(&looked_at.concat(), &stop);
        prop_assert_eq!((text, is_stopped), (free.concat() + &expected, expected_stop));
    }

    #[test]
    fn nothing_certain_is_held_back(pieces in prop::collection::vec("[ab]{0,3}", 1..10), stop in "[ab]{1,4}") {
        let mut matcher = StopMatcher::new(std::slice::from_ref(&stop), 0).unwrap();
        let (mut fed, mut emitted) = (String::new(), String::new());
        for piece in &pieces {
            let out = matcher.push(piece);
            if out.is_stopped {
                break;
            }
            fed += piece;
            emitted += &out.text;
            let held = &fed[emitted.len()..];
            prop_assert!(stop.starts_with(held), "{} is held back for {}", held, stop);
        }
    }
}
