//! Slurm's short ways to write lists: `n[1-2,5],login` for nodes, `2(x3),1` for tasks a node.

/// Most nodes that a list may stand for.
const NODES_MAX: usize = 1 << 16;

/// All nodes in order; `None` if that is no list of nodes.
pub fn expand(list: &str) -> Option<Vec<String>> {
    let mut nodes = Vec::new();
    for word in split_outside_brackets(list)? {
        expand_word(word, "", &mut nodes)?;
    }
    (!nodes.is_empty()).then_some(nodes)
}

/// Cuts at the commas that stand in no bracket.
fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let (mut words, mut start, mut is_inside) = (Vec::new(), 0, false);
    for (at, c) in list.char_indices() {
        match c {
            '[' if is_inside => return None,
            '[' => is_inside = true,
            ']' if !is_inside => return None,
            ']' => is_inside = false,
            ',' if !is_inside => {
                words.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    words.push(&list[start..]);
    (!is_inside && words.iter().all(|word| !word.is_empty())).then_some(words)
}

/// The first bracket takes each of its numbers, what follows is expanded likewise.
fn expand_word(word: &str, before: &str, nodes: &mut Vec<String>) -> Option<()> {
    let Some((head, rest)) = word.split_once('[') else {
        nodes.push(format!("{before}{word}"));
        return (nodes.len() <= NODES_MAX).then_some(());
    };
    let (ranges, tail) = rest.split_once(']')?;
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let width = first.len();
        let (first, last): (usize, usize) = (number(first)?, number(last)?);
        if last < first || last - first >= NODES_MAX {
            return None;
        }
        for n in first..=last {
            // `n[08-11]` keeps its zeros.
            expand_word(tail, &format!("{before}{head}{n:0width$}"), nodes)?;
        }
    }
    Some(())
}

/// Tasks of each node, from `2(x3),1`.
pub fn tasks(list: &str) -> Option<Vec<usize>> {
    let mut tasks = Vec::new();
    for part in list.split(',') {
        let (n, times) = match part.split_once("(x") {
            Some((n, times)) => (n, number(times.strip_suffix(')')?)?),
            None => (part, 1),
        };
        if times > NODES_MAX || tasks.len() > NODES_MAX {
            return None;
        }
        tasks.extend(std::iter::repeat_n(number(n)?, times));
    }
    Some(tasks)
}

/// Digits alone: `parse` would take a sign as well.
fn number(digits: &str) -> Option<usize> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_written_out() {
        let expanded = |list: &str| expand(list).map(|nodes| nodes.join(" "));
        for (list, nodes) in [
            ("n1", "n1"),
            ("n[1-2]", "n1 n2"),
            ("n[1-2,5]", "n1 n2 n5"),
            ("n[08-11],login", "n08 n09 n10 n11 login"),
            ("r[1-2]c[0-1]-ib", "r1c0-ib r1c1-ib r2c0-ib r2c1-ib"),
            ("a,b[3]", "a b3"),
        ] {
            assert_eq!(expanded(list).as_deref(), Some(nodes));
        }
        for wrong in
            ["", "n[", "n]", "n[1", "n[2-1]", "n[a]", "n[+1]", "a,,b", "n[1-]", "n[[1]]", "n[0-99999999]"]
        {
            assert_eq!(expand(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn tasks_a_node_are_written_out() {
        assert_eq!(tasks("2(x3),1"), Some(vec![2, 2, 2, 1]));
        assert_eq!(tasks("4"), Some(vec![4]));
        for wrong in ["", "x", "2(x", "2(x9999999999)", "2x3"] {
            assert_eq!(tasks(wrong), None, "{wrong}");
        }
    }
}
