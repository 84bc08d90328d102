//! Recorders of one program: `memtrace record` and heaptrack, on a loop that allocates and one that
//! touches pages.

use std::path::Path;
use std::process::Command;

use crate::chapter::{ChapterTable, Figure};
use memtrace_tests::programs;

use crate::loops;
use crate::rounds::share;

const LOOPS: [(&str, &[&str]); 2] = [
    ("malloc and free of 16 bytes to 8 KiB", &["malloc"]),
    ("fresh memory (256 MiB mapped, touched, unmapped)", &["fresh", "--mib", "256"]),
];

#[derive(Clone, Copy)]
enum Recorder {
    Memtrace,
    Heaptrack,
}

/// Runs each recorder and loop between two runs of the loop alone.
pub(super) fn measure(dir: &Path, quick: bool) -> anyhow::Result<ChapterTable> {
    let (rounds, ms) = if quick { (2, 100) } else { (7, 300) };
    let mut rows = Vec::new();
    for (name, words) in LOOPS {
        let mut shares = [Vec::new(), Vec::new()];
        let mut plain = Vec::new();
        let mut before = loops::run(words, ms)?.per_second();
        for round in 0..rounds {
            let mut turns = [(0, Recorder::Memtrace), (1, Recorder::Heaptrack)];
            if round % 2 == 1 {
                turns.reverse();
            }
            for (column, recorder) in turns {
                let recorded = loops::of_command(recorder.command(dir, &loops::arguments(words, ms))?)?.per_second();
                let after = loops::run(words, ms)?.per_second();
                if let (Some(share), Some(shares)) = (share(recorded, before, after), shares.get_mut(column)) {
                    shares.push(share * 100.0);
                }
                plain.push(after);
                before = after;
            }
        }
        let [ours, theirs] = shares;
        rows.push(vec![
            name.into(),
            Figure::of(&ours, "%").into(),
            Figure::of(&theirs, "%").into(),
            Figure::of(&plain, "/s").into(),
        ]);
    }
    let columns = ["loop", "memtrace record", "heaptrack", "unrecorded"];
    Ok(ChapterTable {
        title: "Recording one program: its throughput in percent of unrecorded, without what is done when it has ended"
            .to_owned(),
        columns: columns.map(str::to_owned).into(),
        rows,
    })
}

impl Recorder {
    fn command(self, dir: &Path, arguments: &[String]) -> anyhow::Result<Command> {
        let workload = programs::path("workload")?;
        let mut command = match self {
            Self::Memtrace => {
                let mut command = programs::memtrace_command()?;
                command.args(["record", "--quiet", "-o"]).arg(dir.join("recording.memtrace")).arg("--");
                command
            }
            Self::Heaptrack => {
                let mut command = Command::new("heaptrack");
                command.arg("-o").arg(dir.join("heaptrack")).arg("--raw");
                command
            }
        };
        command.arg(workload).args(arguments);
        Ok(command)
    }
}
