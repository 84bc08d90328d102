//! The table of settings, in the order in which they are shown.

use std::time::Duration;

use super::super::values::Span;
use super::{AGENT, DOCTOR, Least, READ, RECORD, Setting, SettingKind};
use crate::agent::DEFAULT_SOCKET;
use memtrace_engine::{MAX_BEFORE_NS, PROCESSES_CAP};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What most settings have in common, to be overwritten by each.
const AGENT_ONLY: Setting = Setting {
    key: "",
    flag: "",
    help: "",
    note: "",
    default: None,
    record_default: None,
    verbs: AGENT,
    kind: SettingKind::Switch { set: |_, _| {} },
};

/// Every setting.
pub(in crate::cli) static SETTINGS: &[Setting] = &[
    Setting {
        key: "state_dir",
        flag: "state-dir",
        help: "Directory where the agent keeps incidents and the ledgers of kills",
        default: Some("/var/lib/memtrace"),
        verbs: AGENT | READ,
        kind: SettingKind::Dir { set: |config, dir| config.state_dir = dir },
        ..AGENT_ONLY
    },
    Setting {
        key: "journal_dir",
        flag: "journal-dir",
        help: "Directory of the journal; keep it on tmpfs",
        note: "After a crash the agent recovers unsaved incidents from it; after a reboot it is not needed.",
        default: Some("/run/memtrace"),
        kind: SettingKind::Dir { set: |config, dir| config.session.journal.get_or_insert_default().dir = dir },
        ..AGENT_ONLY
    },
    Setting {
        key: "journal_size",
        flag: "journal-size",
        help: "Size of the journal",
        note: "The journal of the previous run stays in previous/ until the next start and takes up to as much again. On \
               a full file system it goes first, then the oldest of this run.",
        default: Some("16M"),
        kind: SettingKind::Size {
            min: Least::Bytes(MIB),
            max: None,
            power_of_two: false,
            set: |config, bytes| config.session.journal.get_or_insert_default().bytes = bytes,
        },
        ..AGENT_ONLY
    },
    Setting {
        key: "listen",
        flag: "listen",
        help: "Serve metrics, health and incidents over HTTP at this address; `off` for no TCP",
        note: "On loopback everybody on this machine may ask, unless there is a `--token-file`. On another address only \
               health and metrics are answered without a token.",
        default: Some("127.0.0.1:9469"),
        kind: SettingKind::Address { set: |config, address| config.listen = address },
        ..AGENT_ONLY
    },
    Setting {
        key: "socket",
        flag: "socket",
        help: "Unix socket of the agent, for tools on the same machine; `off` for none",
        note: "`incidents` and `report` ask the agent there when they may not read the state directory, or when the flag \
               is given. The agent makes it with mode 0660; when it cannot make the default one, it says so and runs \
               without.",
        default: Some(DEFAULT_SOCKET),
        verbs: AGENT | READ,
        kind: SettingKind::Socket { set: |config, path| config.socket = path },
        ..AGENT_ONLY
    },
    Setting {
        key: "socket_group",
        flag: "socket-group",
        help: "Group whose members may use the unix socket, by name or number",
        note: "Without it the group `memtrace`, where there is one, else root's.",
        kind: SettingKind::Group { set: |config, group| config.socket_group = Some(group) },
        ..AGENT_ONLY
    },
    Setting {
        key: "token_file",
        flag: "token-file",
        help: "Answer over TCP, but for health and metrics, only who brings the token in this file",
        note: "One line of at least 16 characters; the file is root's and not for everybody. It is sent as \
               `Authorization: Bearer TOKEN`, or as the password that a browser asks for.",
        kind: SettingKind::File { set: |config, file| config.token_file = Some(file) },
        ..AGENT_ONLY
    },
    Setting {
        key: "allow_host",
        flag: "allow-host",
        help: "Answer requests for these names too: a comma-separated list, or repeated",
        note: "Addresses, `localhost` and this machine's name are always answered. Any other name may be a web page's.",
        kind: SettingKind::Names { set: |config, names| config.allow_hosts = names },
        ..AGENT_ONLY
    },
    Setting {
        key: "btf",
        flag: "btf",
        help: "Read kernel types (BTF) from this file instead of /sys/kernel/btf/vmlinux",
        verbs: AGENT | RECORD | DOCTOR,
        kind: SettingKind::File { set: |config, file| config.session.btf = Some(file) },
        ..AGENT_ONLY
    },
    Setting {
        key: "without",
        flag: "without",
        help: "Leave hooks out: a comma-separated list, or repeated; `memtrace doctor` lists them",
        verbs: AGENT | RECORD | DOCTOR,
        kind: SettingKind::Hooks { set: |config, hooks| config.session.without = hooks },
        ..AGENT_ONLY
    },
    Setting {
        key: "quantum",
        flag: "quantum",
        help: "Record a process each time its resident memory has changed by this much",
        note: "A cgroup with a small limit gets a finer threshold: 1/512 of the limit, but at least 16K.",
        default: Some("256K"),
        record_default: Some("64K"),
        verbs: AGENT | RECORD,
        kind: SettingKind::Size {
            min: Least::Pages(4),
            max: Some(GIB),
            power_of_two: false,
            set: |config, bytes| config.session.rss_threshold_bytes = bytes,
        },
    },
    Setting {
        key: "sample",
        flag: "sample",
        help: "Take a stack each time a process has grown by about this much",
        note: "A cgroup that uses more than its share of the stack budget is sampled less often.",
        default: Some("512K"),
        record_default: Some("128K"),
        verbs: AGENT | RECORD,
        kind: SettingKind::Size {
            min: Least::Pages(1),
            max: Some(GIB),
            power_of_two: false,
            set: |config, bytes| config.session.sample_interval_bytes = bytes,
        },
    },
    Setting {
        key: "stack_budget",
        flag: "stack-budget",
        help: "Spend at most this share of one CPU on stacks, in the kernel and in memtrace; 0 takes no stacks",
        note: "Stacks that are left out are counted, and the next stack stands for their bytes.",
        default: Some("1%"),
        record_default: Some("100%"),
        verbs: AGENT | RECORD,
        kind: SettingKind::Share { set: |config, ppm| config.session.stack_budget_ppm = ppm },
    },
    Setting {
        key: "before",
        flag: "before",
        help: "History kept from before an incident",
        default: Some("30s"),
        kind: SettingKind::Span {
            max: Some(Duration::from_nanos(MAX_BEFORE_NS)),
            set: |config, span| config.session.before_ns = Span(span).nanoseconds(),
        },
        ..AGENT_ONLY
    },
    Setting {
        key: "after",
        flag: "after",
        help: "How long an incident goes on recording after its event",
        default: Some("500ms"),
        kind: SettingKind::Span {
            max: Some(Duration::from_secs(600)),
            set: |config, span| config.session.after_ns = Span(span).nanoseconds(),
        },
        ..AGENT_ONLY
    },
    Setting {
        key: "max_processes",
        flag: "max-processes",
        help: "How many processes are followed at once",
        note: "Processes beyond that are not followed; each is counted as lost (`table_full`).",
        default: Some("32768"),
        kind: SettingKind::Count {
            min: 1,
            // More could be followed in the kernel, and would be lost by the engine.
            max: PROCESSES_CAP as u32,
            set: |config, count| config.session.max_processes = count,
        },
        ..AGENT_ONLY
    },
    Setting {
        key: "samples_ring",
        flag: "samples-ring",
        help: "Size of the ring buffer for memory readings",
        note: "Readings that find it full are counted as lost (`samples/ring_full`).",
        default: Some("4M"),
        kind: SettingKind::Size {
            min: Least::Pages(1),
            max: Some(GIB),
            power_of_two: true,
            set: |config, bytes| config.session.samples_ring_bytes = bytes,
        },
        ..AGENT_ONLY
    },
    Setting {
        key: "retain_size",
        flag: "retain-size",
        help: "Keep at most this much in incident files; the oldest are deleted first, the newest of each cgroup last",
        default: Some("512M"),
        kind: SettingKind::Size {
            min: Least::Bytes(0),
            max: None,
            power_of_two: false,
            set: |config, bytes| config.retain_bytes = bytes,
        },
        ..AGENT_ONLY
    },
    Setting {
        key: "retain_age",
        flag: "retain-age",
        help: "Delete incident files that are older than this",
        default: Some("30d"),
        kind: SettingKind::Span { max: None, set: |config, span| config.retain_age = span },
        ..AGENT_ONLY
    },
    Setting {
        key: "no_spikes",
        flag: "no-spikes",
        help: "Do not save spikes: memory that came close to a limit and fell again",
        kind: SettingKind::Switch { set: |config, on| config.session.spikes = !on },
        ..AGENT_ONLY
    },
    Setting {
        key: "no_near_misses",
        flag: "no-near-misses",
        help: "Do not save near misses: a limit that was hit without a kill",
        note: "One is saved when `memory.max` or `memory.high` was hit, memory was reclaimed and nobody was killed within \
               five seconds: at most one a minute for each cgroup, and fewer while it goes on, down to one an hour.",
        kind: SettingKind::Switch { set: |config, on| config.session.near_misses = !on },
        ..AGENT_ONLY
    },
    Setting {
        key: "no_kernel_log",
        flag: "no-kernel-log",
        help: "Do not read the kernel log to cross-check kills",
        kind: SettingKind::Switch { set: |config, on| config.session.kernel_log = !on },
        ..AGENT_ONLY
    },
];
