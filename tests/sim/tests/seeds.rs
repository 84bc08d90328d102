//! The program itself: one seed twice, and what it says.

use std::process::Command;

#[test]
fn a_seed_gives_the_same_run_every_time() {
    let run = || {
        let mut simulator = Command::new(env!("CARGO_BIN_EXE_memtrace-sim"));
        let output = simulator.args(["--seed", "7", "--events", "2000", "--verbose"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let said = run();
    assert!(said.contains("1 seeds") && said.contains("0 failed"), "{said}");
    assert_eq!(said, run());
}
