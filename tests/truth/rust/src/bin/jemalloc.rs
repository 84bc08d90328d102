//! jemalloc.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    memtrace_truth::allocator::run::<1280>("jemalloc");
}
