//! `memtrace agent`: the daemon.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

use super::Outcome;
use super::values::{Share, Size, Span};
use crate::agent;
use crate::error::CommandError;
use crate::kernel::hooks::Hook;
use crate::session;

/// Rows of the engine's table of processes: to follow more in the kernel would lose them here.
const MAX_PROCESSES: u32 = 32_768;
/// The engine's history reaches no further back.
const MAX_BEFORE_NS: u64 = 600_000_000_000;

/// Arguments of `memtrace agent`. Every flag has the same key in the configuration file (`quantum = "256K"`).
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sudo memtrace agent
  sudo memtrace agent --state-dir /srv/memtrace --listen 0.0.0.0:9469
  sudo memtrace agent --config /etc/memtrace.toml

It is ready when it logs `ready` and /readyz answers 200. Stop it with SIGTERM: it closes what is open and says what it lost.
A flag on the command line wins over the configuration file.")]
pub struct Args {
    /// TOML file with any of these flags as keys (`state_dir = "/srv/memtrace"`)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

/// What the command line and the configuration file have in common; unset means the default.
#[derive(clap::Args, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flags {
    /// Where incidents and the kill ledger are kept [default: /var/lib/memtrace]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where the journal is kept: memory-backed, lost at reboot [default: /run/memtrace]
    #[arg(long, value_name = "DIR")]
    journal_dir: Option<PathBuf>,
    /// Size of the journal [default: 16M]; the run before keeps as much again in previous/ until the next start
    #[arg(long, value_name = "SIZE")]
    journal_size: Option<Size>,
    /// Address for metrics, health and incidents; `off` for none [default: 127.0.0.1:9469]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Kernel type information to use instead of the running kernel's own
    #[arg(long, value_name = "FILE")]
    btf: Option<PathBuf>,
    /// Leave hooks out, as a list or repeated (`memtrace doctor` names them)
    #[arg(long, value_name = "HOOK", value_delimiter = ',')]
    without: Option<Vec<Hook>>,
    /// Record a process when its resident memory moved by this much [default: 256K]
    #[arg(long, value_name = "SIZE")]
    quantum: Option<Size>,
    /// History kept before an incident, at most 10m [default: 30s]
    #[arg(long, value_name = "SPAN")]
    before: Option<Span>,
    /// How long an incident gathers after its kill [default: 500ms]
    #[arg(long, value_name = "SPAN")]
    after: Option<Span>,
    /// Processes followed at most, up to 32768 [default: 32768]
    #[arg(long, value_name = "N")]
    max_processes: Option<u32>,
    /// Size of the ring for memory readings, a power of two [default: 4M]
    #[arg(long, value_name = "SIZE")]
    samples_ring: Option<Size>,
    /// Take a stack whenever a process has grown by about this much [default: 512K]
    #[arg(long, value_name = "SIZE")]
    sample: Option<Size>,
    /// Let stacks cost at most this share of one CPU, in the kernel and here; 0 takes none [default: 1%]
    #[arg(long, value_name = "PERCENT")]
    stack_budget: Option<Share>,
    /// Keep at most this much in incidents, oldest dropped first [default: 512M]
    #[arg(long, value_name = "SIZE")]
    retain_size: Option<Size>,
    /// Keep incidents at most this long [default: 30d]
    #[arg(long, value_name = "SPAN")]
    retain_age: Option<Span>,
    /// Do not save spikes that ended without a kill
    #[arg(long, num_args = 0, default_missing_value = "true")]
    no_spikes: Option<bool>,
    /// Do not save limits that were hit without a kill
    #[arg(long, num_args = 0, default_missing_value = "true")]
    no_near_misses: Option<bool>,
    /// Do not read the kernel log as a cross-check
    #[arg(long, num_args = 0, default_missing_value = "true")]
    no_kernel_log: Option<bool>,
}

impl Flags {
    /// Fills what is unset from `other`.
    fn or(self, other: Self) -> Self {
        Self {
            state_dir: self.state_dir.or(other.state_dir),
            journal_dir: self.journal_dir.or(other.journal_dir),
            journal_size: self.journal_size.or(other.journal_size),
            listen: self.listen.or(other.listen),
            btf: self.btf.or(other.btf),
            without: self.without.or(other.without),
            quantum: self.quantum.or(other.quantum),
            before: self.before.or(other.before),
            after: self.after.or(other.after),
            max_processes: self.max_processes.or(other.max_processes),
            samples_ring: self.samples_ring.or(other.samples_ring),
            sample: self.sample.or(other.sample),
            stack_budget: self.stack_budget.or(other.stack_budget),
            retain_size: self.retain_size.or(other.retain_size),
            retain_age: self.retain_age.or(other.retain_age),
            no_spikes: self.no_spikes.or(other.no_spikes),
            no_near_misses: self.no_near_misses.or(other.no_near_misses),
            no_kernel_log: self.no_kernel_log.or(other.no_kernel_log),
        }
    }

    /// Fills the defaults and checks what clap cannot.
    fn options(self) -> anyhow::Result<agent::Options> {
        let defaults = session::Options::default();
        let listen = match self.listen.as_deref() {
            None => Some(SocketAddr::from(([127, 0, 0, 1], 9469))),
            Some("off") => None,
            Some(text) => {
                let wrong =
                    |_| CommandError::Usage(format!("listen: `{text}` is not an address such as 127.0.0.1:9469"));
                Some(text.parse().map_err(wrong)?)
            }
        };
        let session = session::Options {
            btf: self.btf,
            without: self.without.unwrap_or_default(),
            quantum_bytes: self.quantum.map_or(defaults.quantum_bytes, |size| size.0),
            before_ns: self.before.map_or(defaults.before_ns, Span::nanoseconds),
            after_ns: self.after.map_or(defaults.after_ns, Span::nanoseconds),
            max_processes: self.max_processes.unwrap_or(defaults.max_processes),
            samples_ring_bytes: self.samples_ring.map_or(defaults.samples_ring_bytes, |size| size.0),
            stacks_ring_bytes: defaults.stacks_ring_bytes,
            sample_bytes: self.sample.map_or(defaults.sample_bytes, |size| size.0),
            sample_all: defaults.sample_all,
            stack_budget_ppm: self.stack_budget.map_or(defaults.stack_budget_ppm, |share| share.0),
            spikes: !self.no_spikes.unwrap_or(false),
            near_misses: !self.no_near_misses.unwrap_or(false),
            kernel_log: !self.no_kernel_log.unwrap_or(false),
            journal: Some((
                self.journal_dir.unwrap_or_else(|| PathBuf::from("/run/memtrace")),
                self.journal_size.map_or(16 << 20, |size| size.0),
            )),
        };
        session.check().map_err(CommandError::Usage)?;
        if session.max_processes > MAX_PROCESSES {
            let what = format!("max_processes: {} is more than {MAX_PROCESSES}", session.max_processes);
            return Err(CommandError::Usage(what).into());
        }
        if session.before_ns > MAX_BEFORE_NS {
            return Err(CommandError::Usage("before: at most 10m of history is kept".to_owned()).into());
        }
        Ok(agent::Options {
            session,
            state_dir: self.state_dir.unwrap_or_else(|| PathBuf::from(super::STATE_DIR)),
            listen,
            retain_bytes: self.retain_size.map_or(512 << 20, |size| size.0),
            retain_age: self.retain_age.unwrap_or(Span(std::time::Duration::from_secs(30 * 86_400))).0,
        })
    }
}

/// Runs the verb until SIGTERM or SIGINT.
pub fn run(args: Args) -> Outcome {
    let Args { config, flags } = args;
    let file = config.as_deref().map(read_config).transpose()?.unwrap_or_default();
    agent::run(flags.or(file).options()?)?;
    Ok(0)
}

fn read_config(path: &Path) -> anyhow::Result<Flags> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    toml::from_str(&text).map_err(|error| {
        CommandError::Usage(format!("{} is not a valid configuration: {}", path.display(), error.to_string().trim()))
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_file() {
        let file: Flags = toml::from_str("quantum = \"1M\"\nbefore = \"5s\"\nwithout = [\"map\"]").unwrap();
        let flags = Flags { quantum: Some(Size(4096 * 16)), ..Flags::default() };
        let options = flags.or(file).options().unwrap();
        assert_eq!(options.session.quantum_bytes, 65536);
        assert_eq!(options.session.before_ns, 5_000_000_000);
        assert_eq!(options.session.without, [Hook::Map]);
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<Flags>("quantums = 1").unwrap_err().to_string();
        assert!(error.contains("quantums"), "{error}");
    }

    #[test]
    fn what_the_engine_would_cut_off_is_refused() {
        let most = Flags { max_processes: Some(32_768), before: Some("10m".parse().unwrap()), ..Flags::default() };
        assert!(most.options().is_ok());
        let error = Flags { max_processes: Some(32_769), ..Flags::default() }.options().unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(CommandError::Usage(what)) if what.contains("32768")), "{error}");
        let error = Flags { before: Some("601s".parse().unwrap()), ..Flags::default() }.options().unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(CommandError::Usage(what)) if what.contains("10m")), "{error}");
    }

    #[test]
    fn hooks_are_left_out_as_a_list_or_one_by_one() {
        use clap::Parser;
        for words in ["--without map,charge", "--without map --without charge"] {
            for verb in ["agent", "doctor"] {
                let command = format!("memtrace {verb} {words}");
                let cli = crate::cli::Cli::try_parse_from(command.split(' ')).unwrap();
                let without = match cli.verb {
                    crate::cli::Verb::Agent(args) => args.flags.without.unwrap(),
                    crate::cli::Verb::Doctor(args) => args.without,
                    other => panic!("{other:?}"),
                };
                assert_eq!(without, [Hook::Map, Hook::Charge], "{command}");
            }
            let record = format!("memtrace record {words} -- true");
            assert!(crate::cli::Cli::try_parse_from(record.split(' ')).is_ok(), "{record}");
        }
    }

    #[test]
    fn a_wrong_address_is_named() {
        let error = Flags { listen: Some("nowhere".into()), ..Flags::default() }.options().unwrap_err();
        assert!(error.to_string().contains("nowhere"));
    }
}
