//! What the black-box tests share. They run the binary named by `MEMTRACE_BIN` and never link
//! memtrace.

pub mod actor;
pub mod address;
pub mod agent;
pub mod cage;
pub mod claims;
pub mod deadline;
pub mod disk;
pub mod elf_bomb;
pub mod figures;
pub mod growth;
pub mod idle;
pub mod json;
pub mod printk;
pub mod privileges;
pub mod process;
pub mod programs;
pub mod random;
pub mod sample;
pub mod trial;
