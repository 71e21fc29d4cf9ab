//! Exit codes: 0 done, 1 the work failed, 2 wrong usage or recipe, 128 + signal when stopped.

use std::io;
use std::process::ExitCode;

use crate::output;
use crate::stop;

/// Wrong usage or a recipe that cannot be read: the user must change the command.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Report an error on stderr and choose the code.
pub fn code(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // `fulgurite sql … | head` is not a failure.
    if error.chain().any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)) {
        return ExitCode::SUCCESS;
    }
    output::error(&error);
    if error.chain().any(interrupted) {
        return ExitCode::from(stop::exit_code());
    }
    let usage = error.chain().any(|e| e.is::<Usage>() || matches!(e.downcast_ref(), Some(pipeline::Error::Recipe(_))));
    ExitCode::from(if usage { 2 } else { 1 })
}

fn interrupted(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(pipeline::Error::Interrupted))
}
