//! The program `guest` does nothing to a machine that it is not process 1 of. Also why `cargo test` builds the program
//! itself: it does so only for packages with a test target, and the machines boot with it.

use std::process::Command;

#[test]
fn it_refuses_to_run_as_any_other_process() {
    let output = Command::new(env!("CARGO_BIN_EXE_guest")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("cargo xtask vm"), "{said}");
}
