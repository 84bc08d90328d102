//! Machines that run one benchmark each, and the figures it prints there.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::kernels::{BootableKernel, CgroupVersion, KERNELS, Kernel};
use super::machine::{self, MachineParts, Processors};
use super::matrix::fetch;
use super::payload;
use super::selection::Selection;
use super::slots::{Slots, boot};
use memtrace_harness::built::Built;
use memtrace_harness::checkout::Checkout;

/// A benchmark for machines.
pub struct BenchTask<'a> {
    /// Name, also of the directory for consoles and figures.
    pub name: &'a str,
    /// Arguments of `bench`, commas between them.
    pub arguments: &'a str,
    /// Names of kernels of the matrix. Each is booted with the newest version of cgroups it
    /// supports.
    pub kernels: &'a [&'a str],
    /// Paths of programs of the host that the benchmark runs.
    pub borrowed: &'a [&'a str],
    /// CPUs of each machine.
    pub processors: Processors,
    /// Memory of each machine, MiB.
    pub memory: u32,
    /// Slots that the machines wait for.
    pub slots: &'a Slots,
}

/// Result of one machine.
pub struct BenchFigures {
    /// Name of its kernel in the matrix.
    pub kernel: String,
    /// Version of cgroups.
    pub cgroup: String,
    /// Version of the Debian package of its kernel.
    pub version: String,
    /// JSON that `bench` printed.
    pub figures: Value,
    /// Run time by the host's clock.
    pub took: Duration,
}

/// Results by name of the machine.
pub type NamedFigures = Vec<(String, Result<BenchFigures>)>;

impl BenchTask<'_> {
    /// Boots the machines and collects their figures.
    pub fn run(&self, checkout: &Checkout, built: &Built) -> Result<NamedFigures> {
        if std::env::consts::ARCH != "x86_64" {
            bail!("the machines are x86_64, and run what is built for this one");
        }
        let chosen: Vec<(&'static Kernel, Vec<CgroupVersion>)> = KERNELS
            .iter()
            .filter(|kernel| self.kernels.contains(&kernel.name))
            .filter_map(|kernel| Some((kernel, vec![*kernel.cgroups.last()?])))
            .collect();
        let base = checkout.target.join("vm");
        let dir = base.join(self.name);
        std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let mut absent = Vec::new();
        let machines = fetch(&chosen, &base, &mut absent);
        let kernels: Vec<&BootableKernel> = machines.iter().map(|machine| &machine.ready).collect();
        machine::make_disks(&dir)?;
        // the benchmark reports a missing program as not found
        let borrowed: Vec<&str> =
            self.borrowed.iter().copied().filter(|program| Path::new(program).is_file()).collect();
        let initramfs = payload::pack(checkout, built, &dir, &kernels, &borrowed)?;
        // fixed addresses: the number of page tables that a fork copies depends on them
        let append = format!("nokaslr norandmaps memtrace.bench={}", self.arguments);
        let (processors, memory) = (self.processors, self.memory);
        let parts = MachineParts { dir, initramfs, memory, processors, append, keep: false, selection: Selection::All };
        let outcomes = boot(&machines, &parts, self.slots);
        let mut all: NamedFigures = Vec::new();
        for (machine, outcome) in machines.iter().zip(outcomes) {
            let found = outcome.and_then(|outcome| {
                if !outcome.said.troubles.is_empty() || outcome.said.tally.failed > 0 {
                    bail!("{}\n{}", outcome.said.troubles.join("; "), outcome.said.tail.join("\n"));
                }
                let path = machine.out(&parts).join("bench.json");
                let text =
                    std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
                let figures =
                    serde_json::from_str(&text).context("the benchmark printed something that is not JSON")?;
                let (kernel, cgroup) = (machine.kernel.to_owned(), machine.cgroup.to_string());
                Ok(BenchFigures { kernel, cgroup, version: machine.ready.version.clone(), figures, took: outcome.took })
            });
            all.push((machine.name(), found));
        }
        all.extend(absent.into_iter().map(|report| (report.name, Err(anyhow::anyhow!(report.failures.join("; "))))));
        Ok(all)
    }
}
