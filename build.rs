//! Puts the commit into the version.
// Printing is how a build script speaks.
#![allow(clippy::print_stdout)]

use std::process::Command;

fn main() {
    let commit = Command::new("git")
        .args(["rev-parse", "--short=10", "HEAD"])
        .output()
        .ok()
        .filter(|o| o.status.success())
        .and_then(|o| String::from_utf8(o.stdout).ok())
        .map(|s| format!(" ({})", s.trim()))
        .unwrap_or_default();
    println!("cargo:rustc-env=FULGURITE_VERSION={}{commit}", env!("CARGO_PKG_VERSION"));
    // HEAD names the branch, logs/HEAD changes with every commit.
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/logs/HEAD");
}
