//! `dist.toml`: values for flags that neither the command line nor the environment gives.
//!
//! Top-level keys are flags of any command, spelled as on the command line without the dashes; a table such as
//! `[infer]` holds those of one command. The file is applied as the flags' defaults, so that clap parses and checks it
//! like everything else.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::Command;
use toml::{Table, Value};

use crate::problem::{Problem, did_you_mean};

/// The file that is read from the working directory.
pub const FILE: &str = "dist.toml";

/// Flags that belong to one run and not to a file.
const COMMAND_LINE_ONLY: [&str; 8] =
    ["config", "prompt", "prompt_file", "prompt_ids", "prompts", "input", "help", "version"];

/// Bytes of a file at most.
const BYTES_MAX: u64 = 1 << 20;

/// The text of a file, or of a pipe, that ends soon.
fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let n_bytes = std::fs::File::open(path)?.take(BYTES_MAX + 1).read_to_string(&mut text)?;
    if n_bytes as u64 > BYTES_MAX {
        return Err(std::io::Error::other(format!("it has more than {BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// What a file says, one flag after another.
#[derive(Debug, PartialEq)]
pub struct Settings {
    path: PathBuf,
    entries: Vec<Entry>,
}

#[derive(Debug, PartialEq)]
struct Entry {
    /// The only command that it is for.
    command: Option<String>,
    key: String,
    values: Vec<String>,
}

impl Settings {
    /// Reads `path`, or the working directory's file if there is one.
    pub fn find(path: Option<&Path>) -> anyhow::Result<Option<Self>> {
        let (path, is_optional) = path.map_or((Path::new(FILE), true), |path| (path, false));
        match read(path) {
            Ok(text) => Self::parse(path, &text).map(Some),
            Err(error) if is_optional && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                let problem = Problem::usage(format!("cannot read {}", path.display())).because(error);
                Err(problem.help("--config FILE, or DIST_CONFIG, names another file of settings").into())
            }
        }
    }

    fn parse(path: &Path, text: &str) -> anyhow::Result<Self> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let help = "a line is a flag without its dashes: max-seq-len = 1024, device = \"cpu\"";
            Problem::usage(format!("{} is not TOML", path.display())).because(error).help(help)
        })?;
        let mut entries = Vec::new();
        for (key, value) in table {
            match value {
                Value::Table(table) => {
                    for (inner, value) in table {
                        let values = strings(path, &inner, &value)?;
                        entries.push(Entry { command: Some(key.clone()), key: inner, values });
                    }
                }
                value => entries.push(Entry { command: None, values: strings(path, &key, &value)?, key }),
            }
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    /// The file's name, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file's values defaults of the flags that they name.
    pub fn apply(&self, mut root: Command) -> anyhow::Result<Command> {
        for entry in &self.entries {
            let commands = self.commands_of(&root, entry)?;
            for name in commands {
                let default = |arg: clap::Arg| arg.default_values(entry.values.clone());
                root = match name {
                    None => {
                        let id = id_of(&root, &entry.key).unwrap_or_default();
                        root.mut_arg(id, default)
                    }
                    Some(name) => root.mut_subcommand(name, |command| {
                        let id = id_of(&command, &entry.key).unwrap_or_default();
                        command.mut_arg(id, default)
                    }),
                };
            }
        }
        Ok(root)
    }

    /// The commands whose flag `entry` is, `None` for the program's own; at least one.
    fn commands_of(&self, root: &Command, entry: &Entry) -> anyhow::Result<Vec<Option<String>>> {
        let Entry { command, key, .. } = entry;
        let subcommands = || root.get_subcommands().map(Command::get_name);
        if let Some(name) = command.as_deref().filter(|name| !subcommands().any(|other| other == *name)) {
            return Err(self.unknown("command", name, subcommands()));
        }
        let mut found = Vec::new();
        if command.is_none() && id_of(root, key).is_some() {
            found.push(None);
        }
        let mut names = Vec::new();
        for sub in root.get_subcommands() {
            if command.as_deref().is_some_and(|name| name != sub.get_name()) {
                continue;
            }
            if id_of(sub, key).is_some() {
                found.push(Some(sub.get_name().to_owned()));
            }
            names.extend(sub.get_arguments().filter_map(clap::Arg::get_long));
        }
        if found.is_empty() {
            return Err(self.unknown("setting", key, names));
        }
        Ok(found)
    }

    fn unknown<'a>(&self, what: &str, name: &str, names: impl IntoIterator<Item = &'a str>) -> anyhow::Error {
        let help = did_you_mean(name, names);
        let help =
            help.unwrap_or_else(|| "settings are flags without dashes: `dist-cli infer --help`".into());
        Problem::usage(format!("{}: unknown {what} {name}", self.path.display())).help(help).into()
    }
}

/// The flag of `command` that `key` names, by its long name or an alias.
fn id_of(command: &Command, key: &str) -> Option<String> {
    let key = key.replace('_', "-");
    let arg = command.get_arguments().find(|arg| {
        let aliases = arg.get_all_aliases().unwrap_or_default();
        arg.get_long() == Some(key.as_str()) || aliases.contains(&key.as_str())
    })?;
    let id = arg.get_id().as_str();
    (!COMMAND_LINE_ONLY.contains(&id)).then(|| id.to_owned())
}

fn strings(path: &Path, key: &str, value: &Value) -> anyhow::Result<Vec<String>> {
    let one = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(truth) => Some(truth.to_string()),
        _ => None,
    };
    let values = match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => one(value).map(|value| vec![value]),
    };
    values.ok_or_else(|| {
        let what = format!("{}: {key} must be text, a number, true, false, or a list", path.display());
        Problem::usage(what).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> anyhow::Result<Settings> {
        Settings::parse(Path::new(FILE), text)
    }

    fn root() -> Command {
        let arg = |name: &'static str| clap::Arg::new(name).long(name);
        let infer =
            Command::new("infer").arg(arg("threads")).arg(arg("stop").action(clap::ArgAction::Append));
        Command::new("dist-cli").subcommand(infer).subcommand(Command::new("plan").arg(arg("devices")))
    }

    #[test]
    fn only_so_much_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let large = dir.path().join("large");
        std::fs::File::create(&large).unwrap().set_len(BYTES_MAX + 1).unwrap();
        for path in [Path::new("/dev/zero"), dir.path(), &large] {
            let error = Settings::find(Some(path)).unwrap_err();
            assert!(error.to_string().starts_with("cannot read "), "{error}");
        }
        assert!(Settings::find(Some(&dir.path().join("none"))).is_err());
    }

    #[test]
    fn the_command_line_beats_the_file() {
        let root = || settings("threads = 3\n[infer]\nstop = ['a', 'b']\n").unwrap().apply(root()).unwrap();
        let of = |args: &[&str]| root().try_get_matches_from(args).unwrap().remove_subcommand().unwrap().1;
        let from_file = of(&["dist-cli", "infer"]);
        assert_eq!(from_file.get_one::<String>("threads").unwrap(), "3");
        assert_eq!(from_file.get_many::<String>("stop").unwrap().collect::<Vec<_>>(), ["a", "b"]);
        let given = of(&["dist-cli", "infer", "--threads", "5"]);
        assert_eq!(given.get_one::<String>("threads").unwrap(), "5");
    }

    #[test]
    fn what_is_no_flag_is_refused_by_name() {
        for (text, told) in [
            ("thread = 1", "dist.toml: unknown setting thread"),
            ("[inferr]\nthreads = 1", "dist.toml: unknown command inferr"),
            ("[plan]\nthreads = 1", "dist.toml: unknown setting threads"),
        ] {
            let error = settings(text).unwrap().apply(root()).unwrap_err();
            assert_eq!(error.to_string(), told);
        }
        let error = settings("thread = 1").unwrap().apply(root()).unwrap_err();
        assert_eq!(crate::problem::help_of(&error).as_deref(), Some("did you mean threads?"));
        assert_eq!(settings("= 1").unwrap_err().to_string(), "dist.toml is not TOML");
        assert!(settings("a = 1979-05-27").is_err());
    }
}
