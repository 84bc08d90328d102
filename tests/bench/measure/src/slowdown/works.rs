//! The work that is traced: loops, a compiler, a server under load.

use std::fmt::Write;
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use memtrace_tests::agent::{free_port, successful};
use tempfile::TempDir;

use crate::loops;

/// The Redis server. Redis is one binary that acts by its name; Debian's package of the server
/// would start one permanently, while this name is in the package of tools.
const SERVER: &str = "redis-check-rdb";

/// A kind of work and its columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    what: What,
    /// Whether its cost is dominated by page faults, mappings and processes.
    heavy: bool,
    /// Headings of its columns, throughput first.
    columns: &'static [&'static str],
    about: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Loop(&'static [&'static str]),
    Build,
    Server,
}

/// All works, in the order of the columns.
pub(super) const WORKS: [Work; 6] = [
    Work {
        what: What::Loop(&["fresh", "--mib", "256"]),
        heavy: true,
        columns: &["fresh memory"],
        about: "256 MiB mapped, every page touched, unmapped, over and over, in pages a second",
    },
    Work {
        what: What::Loop(&["fresh", "--mib", "128", "--threads", "2"]),
        heavy: true,
        columns: &["fresh memory, 2 threads"],
        about: "the same by two threads, 128 MiB each",
    },
    Work {
        what: What::Loop(&["exec"]),
        heavy: true,
        columns: &["fork and exec"],
        about: "/bin/true started and waited for",
    },
    Work { what: What::Loop(&["map"]), heavy: true, columns: &["mmap, munmap"], about: "64 KiB mapped and unmapped" },
    Work {
        what: What::Build,
        heavy: false,
        columns: &["Rust build"],
        about: "rustc -O of a generated library full of generic code",
    },
    Work {
        what: What::Server,
        heavy: false,
        columns: &["server", "server p50 latency", "server p99 latency"],
        about: "redis-server under redis-benchmark (SET, 20 clients), in requests a second",
    },
];

/// Result of one run.
#[derive(Clone, Copy, Debug)]
pub(super) struct WorkResult {
    /// Throughput or latency.
    pub(super) value: f64,
    /// Its unit.
    pub(super) unit: &'static str,
}

/// Headings of all columns.
pub(super) fn columns() -> Vec<&'static str> {
    WORKS.iter().flat_map(|work| work.columns).copied().collect()
}

/// Description of all works.
pub(super) fn described() -> String {
    WORKS
        .iter()
        .map(|work| format!("{}: {}", work.columns.first().unwrap_or(&""), work.about))
        .collect::<Vec<_>>()
        .join("; ")
}

impl Work {
    /// Index and heading of its throughput column, if it is of this kind.
    pub(super) fn columns(&self, heavy: bool) -> Option<(usize, &'static str)> {
        let name = self.columns.first()?;
        let column = columns().iter().position(|column| column == name)?;
        (self.heavy == heavy).then_some((column, name))
    }
}

/// What the works need: sources and a running server, which ends when dropped.
pub(super) struct PreparedWork {
    dir: TempDir,
    server: Child,
    port: u16,
    loop_ms: u64,
    requests: u32,
}

impl PreparedWork {
    /// Generates sources, starts the server, warms up.
    pub(super) fn prepare(quick: bool) -> anyhow::Result<Self> {
        let (loop_ms, modules, requests) = if quick { (100, 2, 10_000) } else { (300, 8, 60_000) };
        let dir = tempfile::tempdir().context("failed to make a directory for a build")?;
        let source = dir.path().join("lib.rs");
        std::fs::write(&source, generic_code(modules))
            .with_context(|| format!("failed to write {}", source.display()))?;
        let port = free_port()?;
        let mut server = Command::new(SERVER);
        server.arg0("redis-server").args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        server.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = server.spawn().context("failed to start redis-server")?;
        let bench = Self { dir, server, port, loop_ms, requests };
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(begin.elapsed() < Duration::from_secs(20), "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        bench.run_all()?;
        Ok(bench)
    }

    /// Runs each work once: a result for each column.
    pub(super) fn run_all(&self) -> anyhow::Result<Vec<WorkResult>> {
        let mut scores = Vec::new();
        for work in WORKS {
            match work.what {
                What::Loop(words) => {
                    let value = loops::run(words, self.loop_ms)?.per_second();
                    scores.push(WorkResult { value, unit: "/s" });
                }
                What::Build => scores.push(WorkResult { value: 1.0 / self.build()?.as_secs_f64(), unit: "/s" }),
                What::Server => scores.extend(self.serve()?),
            }
        }
        Ok(scores)
    }

    fn build(&self) -> anyhow::Result<Duration> {
        let mut rustc = Command::new(rustc());
        rustc.args(["--edition", "2021", "--crate-type", "rlib", "-O", "lib.rs"]).current_dir(self.dir.path());
        let begin = Instant::now();
        successful(rustc)?;
        Ok(begin.elapsed())
    }

    fn serve(&self) -> anyhow::Result<[WorkResult; 3]> {
        let mut load = Command::new("redis-benchmark");
        load.args(["-p", &self.port.to_string(), "-n", &self.requests.to_string()]);
        load.args(["-c", "20", "-d", "64", "-r", "10000", "-t", "set", "--csv"]);
        let printed = successful(load)?.stdout;
        let [rate, p50, p99] = latencies(&String::from_utf8_lossy(&printed))?;
        Ok([
            WorkResult { value: rate, unit: "/s" },
            WorkResult { value: p50, unit: "ms" },
            WorkResult { value: p99, unit: "ms" },
        ])
    }
}

impl Drop for PreparedWork {
    fn drop(&mut self) {
        // an error means that it has ended already
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The compiler itself: rustup's proxy would be measured too.
fn rustc() -> PathBuf {
    let printed = Command::new("rustc").args(["--print", "sysroot"]).output();
    let sysroot = printed.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    let real = PathBuf::from(sysroot).join("bin/rustc");
    if real.is_file() { real } else { PathBuf::from("rustc") }
}

/// Parses `redis-benchmark --csv`: rate, p50 and p99 of its test.
fn latencies(csv: &str) -> anyhow::Result<[f64; 3]> {
    let mut lines = csv.lines().map(|line| line.split(',').map(|field| field.trim_matches('"')).collect::<Vec<_>>());
    let (Some(heads), Some(fields)) = (lines.next(), lines.next()) else { bail!("redis-benchmark printed {csv}") };
    let of = |head: &str| -> anyhow::Result<f64> {
        let index = heads.iter().position(|found| *found == head).with_context(|| format!("no {head} in {csv}"))?;
        fields.get(index).and_then(|field| field.parse().ok()).with_context(|| format!("no {head} in {csv}"))
    };
    Ok([of("rps")?, of("p50_latency_ms")?, of("p99_latency_ms")?])
}

/// Source of a library that takes the compiler some memory and time.
fn generic_code(modules: usize) -> String {
    let mut code = String::new();
    for n in 0..modules {
        let _ = write!(
            code,
            r#"
pub mod m{n} {{
    use std::collections::{{BTreeMap, HashMap}};
    #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Shelf<K, V> {{ name: String, rows: Vec<(K, V)>, spare: Option<K> }}
    impl<K: Clone + Ord + std::hash::Hash + std::fmt::Debug, V: Clone + Ord + Default + std::fmt::Debug> Shelf<K, V> {{
        pub fn put(&mut self, key: K, value: V) -> usize {{ self.rows.push((key, value)); self.rows.len() }}
        pub fn sorted(&self) -> Vec<(K, V)> {{ let mut rows = self.rows.clone(); rows.sort(); rows.dedup(); rows }}
        pub fn tree(&self) -> BTreeMap<K, Vec<V>> {{
            let mut tree: BTreeMap<K, Vec<V>> = BTreeMap::new();
            for (key, value) in &self.rows {{ tree.entry(key.clone()).or_default().push(value.clone()); }}
            tree
        }}
        pub fn table(&self) -> HashMap<K, V> {{ self.rows.iter().cloned().filter(|(_, v)| *v != V::default()).collect() }}
        pub fn text(&self) -> String {{ format!("{{}} {{:?}} {{:?}}", self.name, self.tree(), self.spare) }}
    }}
    pub fn run(x: u64) -> usize {{
        let mut a = Shelf::<u64, String>::default();
        let mut b = Shelf::<String, (u32, Vec<u8>)>::default();
        for i in 0..x {{ a.put(i ^ {n}, i.to_string()); b.put(i.to_string(), (i as u32, vec![{n} as u8; 3])); }}
        a.sorted().len() + b.sorted().len() + a.table().len() + b.table().len() + a.text().len() + b.text().len()
    }}
}}
"#
        );
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_generator_is_read_by_its_heads() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                   \"p99_latency_ms\",\"max_latency_ms\"\n\"SET\",\"50000.00\",\"0.3\",\"0.1\",\"0.2\",\"0.4\",\"0.5\",\"3\"\n";
        assert_eq!(latencies(csv).unwrap(), [50_000.0, 0.2, 0.5]);
        assert!(latencies("").is_err());
    }

    #[test]
    fn every_work_has_its_columns() {
        let columns = columns();
        let heavy: Vec<_> = WORKS.iter().filter_map(|work| work.columns(true)).collect();
        assert_eq!(heavy.len() + WORKS.iter().filter_map(|work| work.columns(false)).count(), WORKS.len());
        assert!(heavy.iter().all(|(column, name)| columns.get(*column) == Some(name)));
    }
}
