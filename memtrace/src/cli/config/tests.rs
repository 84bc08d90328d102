//! Tests of the configuration: the table, the sources and their order, and what is said about wrong values.

use std::collections::BTreeSet;
use std::fs;

use clap::{CommandFactory, Parser};

use super::super::{Cli, Verb};
use super::*;

fn flags(words: &str) -> Flags<AGENT> {
    let command = format!("memtrace agent {words}");
    match Cli::try_parse_from(command.split_whitespace()).unwrap().verb {
        Verb::Agent(args) => args.settings,
        other => panic!("{other:?}"),
    }
}

/// The configuration of an agent with this file and these flags.
fn agent(file: &str, words: &str) -> Result<AgentConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memtrace.toml");
    fs::write(&path, file).unwrap();
    let config = Config::load(Some(&path), &flags(words)).map_err(|error| error.to_string())?;
    config.parse().map_err(|error| error.to_string())
}

/// What clap says about these words.
fn refused(words: &str) -> String {
    let command = format!("memtrace {words}");
    Cli::try_parse_from(command.split_whitespace()).unwrap_err().to_string()
}

#[test]
fn every_setting_has_one_name_a_sentence_and_a_default_that_is_valid() {
    let mut names = BTreeSet::new();
    for setting in SETTINGS {
        let key = setting.key;
        assert_eq!(setting.flag, key.replace('_', "-"));
        assert!(!key.is_empty() && names.insert(key), "{key}");
        assert!(!setting.help.is_empty() && !setting.help.ends_with('.'), "{key}");
        assert!(setting.note.is_empty() || setting.note.ends_with('.'), "{key}");
        for default in [setting.default, setting.record_default].into_iter().flatten() {
            setting.check(OsStr::new(default)).unwrap();
        }
    }
    Cli::command().debug_assert();
}

#[test]
fn no_field_is_left_without_its_default() {
    let config = Config::load(None, &Flags::<AGENT>::default()).unwrap().parse().unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/memtrace"));
    assert_eq!(config.listen, Some(SocketAddr::from(([127, 0, 0, 1], 9469))));
    assert_eq!(config.socket.as_deref(), Some(Path::new("/run/memtrace.sock")));
    assert_eq!((&config.socket_group, &config.token_file), (&None, &None));
    assert_eq!((config.retain_bytes, config.retain_age), (512 << 20, Duration::from_secs(30 * 86_400)));
    let session = &config.session;
    let journal = session.journal.as_ref().unwrap();
    assert_eq!((journal.dir.as_path(), journal.bytes), (Path::new("/run/memtrace"), 16 << 20));
    assert_eq!((session.rss_threshold_bytes, session.sample_interval_bytes), (256 << 10, 512 << 10));
    assert_eq!((session.before_ns, session.after_ns), (30_000_000_000, 500_000_000));
    assert_eq!((session.max_processes, session.samples_ring_bytes), (32_768, 4 << 20));
    assert_eq!(session.stack_budget_ppm, 10_000);
    assert!(session.spikes && session.near_misses && session.kernel_log && session.without.is_empty());
    let record = Config::load(None, &Flags::<RECORD>::default()).unwrap().parse().unwrap().session;
    assert_eq!((record.rss_threshold_bytes, record.sample_interval_bytes), (64 << 10, 128 << 10));
    assert_eq!((record.stack_budget_ppm, record.before_ns), (1_000_000, 30_000_000_000));
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let file = "quantum = \"1M\"\nbefore = \"5s\"\nwithout = [\"map\"]\nretain_size = 4096\nno_spikes = true";
    let config = agent(file, "--quantum 64K --without charge,exit_mmap --no-near-misses").unwrap();
    assert_eq!(config.session.rss_threshold_bytes, 64 << 10);
    assert_eq!(config.session.before_ns, 5_000_000_000);
    assert_eq!(config.session.after_ns, 500_000_000);
    assert_eq!(config.session.without, [Hook::Charge, Hook::ExitMmap]);
    assert_eq!(config.retain_bytes, 4096);
    assert!(!config.session.spikes && !config.session.near_misses && config.session.kernel_log);
}

#[test]
fn what_is_printed_is_read_back_as_the_same() {
    let words = "--quantum 64K --listen off --socket off --socket-group adm --token-file /t --without map \
                 --btf /a\"b --no-kernel-log --max-processes 7 \
                 --stack-budget 0.5 --retain-age 1.5d";
    for words in ["", words] {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first.toml"), dir.path().join("second.toml"));
        let config = Config::load(None, &flags(words)).unwrap();
        fs::write(&first, config.to_toml().unwrap()).unwrap();
        let again = Config::load(Some(&first), &flags("")).unwrap();
        assert_eq!(format!("{:?}", again.parse().unwrap()), format!("{:?}", config.parse().unwrap()));
        fs::write(&second, again.to_toml().unwrap()).unwrap();
        assert_eq!(fs::read_to_string(&first).unwrap(), fs::read_to_string(&second).unwrap());
    }
    // A key that is commented out is one that the file could have.
    let unset = Config::load(None, &flags("")).unwrap().to_toml().unwrap().replace("# btf = \"\"", "btf = \"/x\"");
    assert_eq!(agent(&unset, "").unwrap().session.btf.as_deref(), Some(Path::new("/x")));
}

#[test]
fn a_value_out_of_bounds_is_refused_by_flag_and_by_file() {
    let page = rustix::param::page_size() as u64;
    for (key, least, most, beyond) in [
        ("quantum", Size(4 * page).to_string(), "1G", "1.1G"),
        ("sample", Size(page).to_string(), "1G", "2G"),
        ("samples_ring", Size(page).to_string(), "1G", "2G"),
        ("samples_ring", "64K".to_owned(), "1M", "3M"),
        ("journal_size", "1M".to_owned(), "1T", "1023K"),
        ("before", "0s".to_owned(), "10m", "601s"),
        ("after", "0s".to_owned(), "10m", "601s"),
        ("stack_budget", "0".to_owned(), "100%", "101%"),
    ] {
        let flag = key.replace('_', "-");
        for valid in [&least, most] {
            agent(&format!("{key} = \"{valid}\""), &format!("--{flag} {valid}")).unwrap();
        }
        let error = agent(&format!("{key} = \"{beyond}\""), "").unwrap_err();
        assert!(error.contains(&format!("memtrace.toml: {key}: `{beyond}` is ")), "{error}");
        let error = refused(&format!("agent --{flag} {beyond}"));
        assert!(error.contains(&format!("'--{flag} <")) && error.contains(beyond), "{error}");
    }
    assert_eq!(agent("max_processes = 32768", "").unwrap().session.max_processes, 32_768);
    let error = agent("max_processes = 32769", "").unwrap_err();
    assert!(error.ends_with("memtrace.toml: max_processes: `32769` is out of range (1 to 32768)"), "{error}");
    let error = refused("agent --max-processes 0");
    assert!(error.contains("--max-processes") && error.contains("1 to 32768"), "{error}");
}

#[test]
fn a_wrong_file_is_named_with_its_key() {
    for (file, named) in [
        ("quantums = 1", "memtrace.toml: unknown key `quantums`: `memtrace agent --print-config` lists the keys"),
        ("state-dir = \"/x\"", "memtrace.toml: unknown key `state-dir`: write `state_dir`"),
        ("before = 5", "memtrace.toml: before: must be a string, such as \"30s\""),
        ("before = \"5\"", "memtrace.toml: before: `5` is not a time span"),
        ("quantum = true", "memtrace.toml: quantum: must be a string, such as \"16M\""),
        ("quantum = -1", "memtrace.toml: quantum: `-1` is not a size"),
        ("no_spikes = \"yes\"", "memtrace.toml: no_spikes: must be true or false"),
        ("max_processes = \"5\"", "memtrace.toml: max_processes: must be a number"),
        ("without = \"map\"", "memtrace.toml: without: must be a list"),
        ("without = [\"mop\"]", "memtrace.toml: without: `mop` is not a hook: there are rss, "),
        ("without = [\"oom\"]", "memtrace.toml: without: memtrace cannot run without the hook oom"),
        ("listen = \"nowhere\"", "memtrace.toml: listen: `nowhere` is not an address"),
        ("socket = \"run/x\"", "memtrace.toml: socket: `run/x` is not the path of a socket: give one that begins"),
        ("socket_group = \"\"", "memtrace.toml: socket_group: `` is not a group: give its name or its number"),
        ("state_dir = \"\"", "memtrace.toml: state_dir: a path must not be empty"),
        ("a = = b", "memtrace.toml: not TOML: "),
    ] {
        let error = agent(file, "").unwrap_err();
        assert!(error.contains(named), "{file}: {error}");
    }
}

#[test]
fn the_rss_hook_can_be_left_out_for_charges_and_no_other_required_one() {
    assert!(agent("", "--without rss").is_ok());
    for words in ["--without rss,charge", "--without kill"] {
        let error = agent("", words).unwrap_err();
        assert!(error.starts_with("--without: memtrace cannot run without the hook "), "{error}");
    }
    // `doctor` says so in its report.
    let without = Flags::<DOCTOR>::with(&[("without", OsStr::new("kill"))]);
    assert!(Config::load(None, &without).unwrap().parse().is_ok());
}

#[test]
fn the_socket_can_be_off() {
    for off in ["off", "none", ""] {
        assert_eq!(agent(&format!("socket = \"{off}\""), "").unwrap().socket, None, "{off}");
    }
    let config = agent("socket = \"off\"", "--socket /run/x/y --socket-group adm --token-file /etc/t").unwrap();
    assert_eq!(config.socket.as_deref(), Some(Path::new("/run/x/y")));
    assert_eq!(
        (config.socket_group.as_deref(), config.token_file.as_deref()),
        (Some("adm"), Some(Path::new("/etc/t")))
    );
    assert!(refused("agent --socket x").contains("begins with `/`") && refused("report x --socket /").contains("`/`"));
}

#[test]
fn hooks_are_a_list_or_one_by_one() {
    for words in ["--without map,charge", "--without map --without charge"] {
        assert_eq!(agent("", words).unwrap().session.without, [Hook::Map, Hook::Charge], "{words}");
        for verb in ["doctor", "record"] {
            let command = format!("memtrace {verb} {words}");
            assert!(Cli::try_parse_from(command.split(' ')).is_ok(), "{command}");
        }
    }
    let error = refused("agent --without mop");
    assert!(error.contains("mop") && error.contains("charge"), "{error}");
}

#[test]
fn a_path_need_not_be_utf8_unless_it_is_printed() {
    use std::os::unix::ffi::OsStrExt;
    let config = Config::load(None, &Flags::<AGENT>::with(&[("state_dir", OsStr::from_bytes(b"/a\xff"))])).unwrap();
    assert_eq!(config.parse().unwrap().state_dir.as_os_str(), OsStr::from_bytes(b"/a\xff"));
    assert!(config.to_toml().unwrap_err().to_string().contains("--state-dir"));
}
