//! mimalloc.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    memtrace_truth::allocator::run::<256>("mimalloc");
}
