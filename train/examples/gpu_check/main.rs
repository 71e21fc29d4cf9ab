//! Checks every CUDA operation against float64 and measures it against the floor of bytes and
//! operations: `gpu_check [SECTION..]`, all sections without an argument. Fails when a check does.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used)]

mod measure;
mod sections;

use std::time::Instant;

use measure::Bench;
use train::device::DeviceChoice;

fn main() {
    tracing_to_stderr();
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let known: Vec<&str> = sections::ALL.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = asked.iter().find(|name| !known.contains(&name.as_str())) {
        eprintln!("no section {unknown}: there are {}", known.join(", "));
        std::process::exit(2);
    }
    let libraries = train::cuda::libraries::find();
    for library in libraries.all() {
        match &library.found {
            Ok(found) => println!("{:<10} {:<10} {}", library.name, found.version, found.path.display()),
            Err(advice) => println!("{:<10} {advice}", library.name),
        }
    }
    println!("{:<10} {:?}", "headers", libraries.headers);
    println!("{:?}", train::cuda::device_facts(0).unwrap());
    let device = DeviceChoice::Cuda(0).select().unwrap();
    let mut bench = Bench::new(device);
    for (name, section) in sections::ALL {
        if name == "ceilings" || asked.is_empty() || asked.iter().any(|asked| asked == name) {
            println!("\n== {name}");
            let begin = Instant::now();
            section(&mut bench);
            println!("   [{name}: {:.1} s]", begin.elapsed().as_secs_f64());
        }
    }
    println!("\n{} checks, {} failed", bench.checks, bench.failed.len());
    for failed in &bench.failed {
        println!("FAILED {failed}");
    }
    std::process::exit(i32::from(!bench.failed.is_empty()));
}

/// Failures on the device thread are events of `tracing`.
fn tracing_to_stderr() {
    struct Errors;
    impl tracing::Subscriber for Errors {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            *metadata.level() <= tracing::Level::WARN
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, event: &tracing::Event<'_>) {
            struct Message;
            impl tracing::field::Visit for Message {
                fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                    eprintln!("   log: {value:?}");
                }
            }
            event.record(&mut Message);
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    let _ = tracing::subscriber::set_global_default(Errors);
}
