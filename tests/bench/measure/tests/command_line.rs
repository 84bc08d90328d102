//! The program `bench` knows its benchmarks by name. Also why `cargo test` builds the program itself: it does so only
//! for packages with a test target, and the machines boot with it.

use std::process::Command;

#[test]
fn an_unknown_benchmark_is_a_usage_error_that_lists_the_others() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench")).arg("nothing").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    for name in ["spikes", "kills", "counted", "spread"] {
        assert!(said.contains(name), "{said}");
    }
}
