//! The C library's allocator, as a Rust program gets it.

fn main() {
    memtrace_truth::allocator::run::<256>("rust_system");
}
